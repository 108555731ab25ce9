"""The `distill` command: handles signals first, then imports the command line."""

from distill import interrupts

interrupts.install()


def main() -> None:
    """Run the command line and exit with its code."""
    from distill.cli import main

    main()


if __name__ == "__main__":
    main()
