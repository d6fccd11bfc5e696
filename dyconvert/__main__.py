"""`python -m dyconvert`, and `torchrun -m dyconvert`."""

from dyconvert.cli import main

if __name__ == "__main__":
    main()
