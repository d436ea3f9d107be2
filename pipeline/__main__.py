"""`python -m pipeline` is `firstlight`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
