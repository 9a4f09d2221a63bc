"""The released name of `scripts/prepare_ade20k.py`."""

from segm.scripts import forward

if __name__ == "__main__":
    forward("prepare_ade20k.py")
