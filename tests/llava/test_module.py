import pytest
import torch

from mir_lightning.llava.module import LlavaPretraining, _captions_only
from tests.models import tiny_batch, tiny_llava


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr("mir_lightning.llava.module.build_packaged_llava", tiny_llava)

    def build(**options):
        module = LlavaPretraining(**options)
        module.configure_model()
        return module

    return build


@pytest.mark.parametrize("llm_lr", [None, 5e-5])
def test_exactly_the_named_parts_learn(built, llm_lr):
    module = built(llm_lr=llm_lr)
    before = {k: v.clone() for k, v in module.vlm.named_parameters()}
    groups = [{"params": list(p.parameters()), "lr": lr} for p, lr in module._trained_parts()]
    optimizer = torch.optim.SGD(groups)
    module.vlm(**_captions_only(tiny_batch())).loss.backward()
    optimizer.step()
    changed = {k.split(".")[1] for k, v in module.vlm.named_parameters() if not torch.equal(v, before[k])}
    assert changed == ({"multi_modal_projector", "language_model"} if llm_lr else {"multi_modal_projector"})
    assert not any(m.training for m in module.vlm.model.vision_tower.modules())


def test_logits_for_captions_only_give_the_same_loss():
    model = tiny_llava().eval()
    batch = tiny_batch()
    batch["labels"][:, :13] = -100
    assert model(**_captions_only(batch)).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_lr": 0}, "projector_lr must be above 0, got 0"),
        ({"llm_lr": -1.0}, "llm_lr must be above 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LlavaPretraining(**options)
