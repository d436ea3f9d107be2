"""What a training of n images on w workers moves, holds and waits for, told from the real code: `python -m bench.scaling`."""
