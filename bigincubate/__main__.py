"""Run the command line: ``bigincubate`` and ``python -m bigincubate``."""

from .distributed import interrupts

interrupts.install()  # first of all: what follows imports much, and Ctrl-C may come at any moment


def main() -> None:
    """Run the command line. Ctrl-C is one line at any moment, also during the imports."""
    try:
        interrupts.raises = True
        from .cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        interrupts.say_interrupted()
        raise SystemExit(interrupts.EXIT_CODE) from None
    finally:
        interrupts.ignore_if_interrupted()


if __name__ == "__main__":
    main()
