"""Exit codes of `fsm-ray`, and what each error of ours means."""

from __future__ import annotations

from fsm_ray.errors import ConfigurationError, FsmRayError, InvalidInput, NamespaceUnavailable, RayUnreachable

EXIT_FAILED = 1  # it ran, and the result is not what it must be; or it could not go on
EXIT_USAGE = 2  # wrong options, a wrong file, a missing extra: nothing was done
EXIT_UNAVAILABLE = 3  # no Ray, or no answer from it: try again
EXIT_INTERRUPTED = 130  # Ctrl-C, as in a shell; typer gives it
EXIT_UNREAD = 141  # whoever read stdout, as `head` does, had enough; as in a shell, after SIGPIPE

EPILOG = (
    f"Exit codes: 0 all is well; {EXIT_FAILED} the result is not what it must be; {EXIT_USAGE} wrong options"
    f" or setup; {EXIT_UNAVAILABLE} Ray or a bot's actor does not answer; {EXIT_INTERRUPTED} interrupted;"
    f" {EXIT_UNREAD} nobody reads what is printed, as behind `| head`."
)


def exit_code(error: FsmRayError) -> int:
    """The code that the command ends with on this error."""
    if isinstance(error, (RayUnreachable, NamespaceUnavailable)):
        return EXIT_UNAVAILABLE
    return EXIT_USAGE if isinstance(error, (InvalidInput, ConfigurationError)) else EXIT_FAILED
