"""Shared by all tests: no network, and the devices at hand."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def tiny_processor():
    """The packaged tokenizer, with pictures of 12 x 12 pixels: 9 patches and CLS for ``tiny_llava``."""
    from mir_lightning.llava.demo.weights import build_packaged_processor

    processor = build_packaged_processor()
    processor.image_processor.size = {"height": 12, "width": 12}
    processor.patch_size = 4
    processor.num_additional_image_tokens = 1
    return processor


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Each device at hand: where there is a GPU, a test that asks for one runs on it too."""
    return torch.device(request.param)
