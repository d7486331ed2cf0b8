"""The MIR paper's script, restated from its procedure, on the images and texts that the command line gets."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from mir_lightning.functional import modality_integration_rate


def _generated_states(shared, image, text):
    """Hidden states of the prompt, one sample through ``generate`` as the script runs it, layer by layer."""
    inputs = shared.processor(images=Image.open(image).convert("RGB"), text=text, return_tensors="pt")
    made = shared.model.eval().generate(
        **inputs, max_new_tokens=1, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    is_vision = (inputs["input_ids"][0] == shared.processor.image_token_id).numpy()
    after = np.arange(len(is_vision)) > np.flatnonzero(is_vision)[-1]
    states = [state[0].float().numpy() for state in made.hidden_states[0][1:]]
    return [(state[is_vision], state[after]) for state in states]


def _replace_outliers(tokens):
    norms = np.linalg.norm(tokens, axis=1)
    middle = np.sort(norms)[(len(norms) - 1) // 2]
    outlying = np.abs(norms - middle) > 3 * norms.std(ddof=1)
    median = np.sort(tokens, axis=0)[(len(tokens) - 1) // 2]
    return np.where(outlying[:, None], median, tokens)


def _distance(vision, text, fast):
    scale = 1 / np.linalg.norm(text, axis=1).mean()
    vision, text = (_replace_outliers((tokens * scale).astype(np.float32)) for tokens in (vision, text))
    covs = [np.cov(tokens, rowvar=False).astype(np.float32) for tokens in (vision, text)]
    product = covs[0] @ covs[1]
    if fast:
        y, z = torch.from_numpy(product), torch.eye(len(product))
        for _ in range(5):
            y = (y + torch.linalg.inv(z) @ torch.from_numpy(product)) / 2
            z = (z + torch.linalg.inv(y) @ torch.from_numpy(product)) / 2
        root = y.numpy()
    else:
        root = scipy.linalg.sqrtm(product.astype(np.float64)).real
    gap = vision.mean(0) - text.mean(0)
    return gap @ gap + np.trace(covs[0]) + np.trace(covs[1]) - 2 * np.trace(root)


def _script_text(shared, story):
    """The script's conversation: system, the picture as the user's turn, the story as the assistant's."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    turns = [("USER", f"{shared.processor.image_token}\n", " "), ("ASSISTANT", story, "END")]
    text = system + " " + "".join(f"{role}: {said}{end}" for role, said, end in turns)
    return text.replace("END", shared.processor.tokenizer.eos_token)


def _script_distances(shared, texts, fast=False):
    samples = [
        _generated_states(shared, shared.root / "images" / f"{i}.png", text) for i, text in enumerate(texts)
    ]
    layers = zip(*samples, strict=True)
    return [_distance(*(np.concatenate(parts) for parts in zip(*layer, strict=True)), fast) for layer in layers]


STORIES = ["The tide comes in twice a day.", "A short story.", "Ünïcode, and then some more words."]


@pytest.mark.parametrize("preset", [False, True])
def test_the_released_scripts_accurate_numbers(run, shared, tmp_path, preset):
    plain = [f"USER: {shared.processor.image_token}\n ASSISTANT: {story}" for story in STORIES]
    distances = _script_distances(shared, [_script_text(shared, s) for s in STORIES] if preset else plain)
    arguments = ["--preset", "mir-paper"] if preset else []
    run("eval", shared.root / "model", *arguments, "--variant", "official", "--json", tmp_path / "out.json")
    ours = json.loads((tmp_path / "out.json").read_text())
    assert ours["layers"] == pytest.approx(distances, rel=1e-4)
    assert ours["mir"] == pytest.approx(np.log10(sum(distances)), abs=1e-4)


def test_the_preset_computes_what_the_script_computes_by_default(run, shared, tmp_path):
    """Its default mode inverts near-singular matrices here: the closed form of docs/published_numbers.md."""
    run("eval", shared.root / "model", "--preset", "mir-paper", "--json", tmp_path / "out.json")
    ours = json.loads((tmp_path / "out.json").read_text())
    assert (ours["variant"], ours["text"]) == ("official-fast", "after_vision")
    exact = _script_distances(shared, [_script_text(shared, story) for story in STORIES])
    assert ours["mir"] > np.log10(sum(exact))
    refused = run("eval", shared.root / "model", "--preset", "mir-paper", "--prompt", "{image}{text}")
    assert (refused.status, "--preset mir-paper says what --prompt would" in refused.err) == (1, True)
    saved = tmp_path / "probe.safetensors"
    assert run("probe", shared.root / "model", "--preset", "mir-paper", "-o", saved).status == 0
    run("eval", shared.root / "model", "--probe", saved, "--json", tmp_path / "again.json", pairs=False)
    again = json.loads((tmp_path / "again.json").read_text())
    assert [again[key] for key in ("mir", "variant")] == [ours[key] for key in ("mir", "variant")]
    conversations = run("eval", "m", "--preset", "mir-paper", "--data", tmp_path / "data.json", pairs=False)
    assert "puts texts behind pictures: --images and --texts, not --data" in conversations.err
    interval = run("eval", shared.root / "model", "--preset", "mir-paper", "--interval")
    assert "--variant official-fast has no interval" in interval.err


def test_the_released_scripts_default_numbers_where_they_are_determined():
    """Its float32 inverses of near-singular matrices are rounding; of well-conditioned tokens they are not."""
    rng = np.random.default_rng(0)
    vision, text = (rng.standard_normal((n, 24)) * np.geomspace(1, 0.3, 24) + o for n, o in ((900, 0.2), (700, 0)))
    vision[:5] *= 40
    tokens = [torch.from_numpy(x.astype(np.float32)) for x in (vision, text)]
    ours = modality_integration_rate([tokens[0]], [tokens[1]], "official-fast").item()
    assert ours == pytest.approx(np.log10(_distance(vision, text, fast=True)), abs=1e-5)
    assert abs(ours - np.log10(_distance(vision, text, fast=False))) > 0.1


def test_the_command_runs_the_default_variant(run, shared, tmp_path):
    """As far as it is determined: the closed form of docs/published_numbers.md, from the result itself."""
    found = {}
    for variant in ("official", "official-fast"):
        run("eval", shared.root / "model", "--variant", variant, "--json", tmp_path / f"{variant}.json")
        found[variant] = json.loads((tmp_path / f"{variant}.json").read_text())
    assert found["official-fast"]["mean_gap"] == pytest.approx(found["official"]["mean_gap"], rel=1e-9)
    spread = np.sum(found["official"]["total_variance"], axis=1)
    upper = np.array(found["official"]["mean_gap"]) + spread  # it subtracts 2 Tr(S_v S_t), which is not negative
    assert (np.array(found["official-fast"]["layers"]) < upper).all()
    assert found["official-fast"]["mir"] > found["official"]["mir"]
