"""`python -m firstlight.pipeline` is the command `firstlight`."""

from firstlight.pipeline.cli.main import run_process

if __name__ == "__main__":
    run_process()
