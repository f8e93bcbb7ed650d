"""Run the command line: ``bigincubate`` and ``python -m bigincubate``."""

from .compat import interpreter_exit
from .distributed import interrupts

interrupts.install()  # as early as possible: the imports below take long, and Ctrl-C may come at any moment
interpreter_exit.skip_teardown()


def main() -> None:
    """Run the command line. Ctrl-C prints one line at any moment, also during the imports."""
    try:
        try:
            interrupts.raises = True
            from .cli import main as run_command_line

            run_command_line()
        except KeyboardInterrupt:
            interrupts.say_interrupted()
            raise SystemExit(interrupts.EXIT_CODE) from None
        except Exception:
            if not interrupts.count:
                raise
            # C extensions replace a KeyboardInterrupt during their import by an ImportError
            interrupts.say_interrupted()
            raise SystemExit(interrupts.EXIT_CODE) from None
    except SystemExit as end:
        interpreter_exit.exit_code = end.code if isinstance(end.code, int) else None
        raise
    finally:
        interrupts.ignore_if_interrupted()


if __name__ == "__main__":
    main()
