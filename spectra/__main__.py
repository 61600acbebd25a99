"""`python -m spectra`: the command line."""

from spectra.cli import main

if __name__ == "__main__":
    main()
