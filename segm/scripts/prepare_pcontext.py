"""The released name of `scripts/prepare_pascal_context.py`."""

from segm.scripts import forward

if __name__ == "__main__":
    forward("prepare_pascal_context.py")
