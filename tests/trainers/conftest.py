import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
# A torchvision for another build of torch fails when transformers imports it, and no model here needs one.
sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]
