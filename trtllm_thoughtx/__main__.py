"""`python -m trtllm_thoughtx` is `thoughtx`."""

from trtllm_thoughtx.cli.entry import main

if __name__ == "__main__":
    main()
