import pytest

from mir_lightning.llava.model.module import labelled_only
from tests.models import tiny_batch, tiny_llava


def test_logits_for_captions_only_give_the_same_loss():
    model = tiny_llava().eval()
    batch = tiny_batch()
    batch["labels"][:, :13] = -100
    assert model(**labelled_only(batch)).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
