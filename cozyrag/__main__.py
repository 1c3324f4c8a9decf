"""`python -m cozyrag COMMAND`, and `accelerate launch -m cozyrag train` for several processes without a checkout."""

from cozyrag.cli import main

if __name__ == "__main__":
    main()
