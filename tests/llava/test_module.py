import pytest

from mir_lightning.llava.model.module import model_inputs
from tests.models import tiny_batch, tiny_llava


def test_logits_for_captions_only_give_the_same_loss():
    model = tiny_llava().eval()
    batch = tiny_batch()
    batch["labels"][:, :13] = -100
    assert model(**model_inputs(batch, flash=False)).loss.item() == pytest.approx(
        model(**batch).loss.item(), rel=1e-6
    )
