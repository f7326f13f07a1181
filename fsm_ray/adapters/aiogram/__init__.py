"""What an aiogram 3 bot keeps its conversations with: RayStorage, RayEventIsolation, RayFSMMiddleware."""

from __future__ import annotations

from fsm_ray.errors import MissingExtra

try:
    from fsm_ray.adapters.aiogram.isolation import RayEventIsolation
    from fsm_ray.adapters.aiogram.records import record_key
    from fsm_ray.adapters.aiogram.storage import RayStorage
    from fsm_ray.adapters.aiogram.turns import RayFSMMiddleware
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"the aiogram adapter needs {error.name!r}, which is not installed: pip install 'fsm-ray[aiogram]'"
    ) from error

__all__ = ["RayEventIsolation", "RayFSMMiddleware", "RayStorage", "record_key"]
