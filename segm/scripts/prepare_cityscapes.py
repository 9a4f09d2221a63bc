"""The released name of `scripts/prepare_cityscapes.py`."""

from segm.scripts import forward

if __name__ == "__main__":
    forward("prepare_cityscapes.py")
