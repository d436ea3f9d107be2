"""`python -m firstlight.pipeline` is the command `firstlight`."""

from firstlight.pipeline.cli.main import main

if __name__ == "__main__":
    main()
