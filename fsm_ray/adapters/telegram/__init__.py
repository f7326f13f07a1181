"""What python-telegram-bot keeps data and conversations with: RayPersistence, RayApplication."""

from __future__ import annotations

from fsm_ray.errors import MissingExtra

try:
    from fsm_ray.adapters.telegram.application import RayApplication
    from fsm_ray.adapters.telegram.persistence import RayPersistence
    from fsm_ray.adapters.telegram.records import conversation_key
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"RayPersistence needs {error.name!r}, which is not installed: pip install 'fsm-ray[telegram]'"
    ) from error

__all__ = ["RayApplication", "RayPersistence", "conversation_key"]
