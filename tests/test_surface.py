"""What the packages offer by name, what importing them costs, and how their modules hang together."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

NAMES = {
    "audio": "LAP LTDNN LiveSeparator MossFormer MossFormer2 SelfSupervised SpeakerEncoder SpeakerSystem "
    "model_separator read_samples resample separate_recording separate_samples train_separation train_speaker_model",
    "eeg": "AGTCNet Decoder NetworkClassifier Preprocessing Recipe Recording StreamDecoder electrode_graph evaluate "
    "find_recordings load_trials pseudo_online read_recording trials_array",
    "language": "MIXERS MixerCache MixerConfig MixerForCausalLM MixerModel Recipe byte_tokenizer load_causal_lm "
    "run_tasks score train_language_model",
    "medical": "DeepLabV2 DeepLabV3 GuidedAttention MACMD Recipe Scan Segmenter create_network find_cases read_scan "
    "refine score_cases train_segmenter write_bundle write_labels",
    "vision": "AttNet Classifier ConvNeXt HorNet LSNet OverLoCK Pictures SiT TransXNet attention_maps create_model "
    "draw_attention train_classifier",
}


@pytest.mark.parametrize("domain", NAMES)
def test_main_names(domain):
    package = importlib.import_module(f"nearfar.{domain}")
    assert package.__all__ == NAMES[domain].split() == dir(package)
    assert 6 <= len(package.__all__) <= 15
    for name in package.__all__:
        value = getattr(package, name)
        assert getattr(value, "__name__", name) == name
    with pytest.raises(AttributeError, match="it offers"):
        package.surprise  # noqa: B018
    assert (Path(package.__file__).parent / "py.typed").is_file()


def run(code):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_domain_imports_no_library():
    heavy = {"torch", "numpy", "mne", "monai", "timm", "transformers", "lightning", "matplotlib"}
    run(
        f"import sys, {', '.join(f'nearfar.{domain}' for domain in NAMES)}\n"
        f"found = {heavy} & set(sys.modules)\nassert not found, found"
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    "order",
    [
        "import timm, nearfar.vision",
        "import nearfar.vision, timm",
        # as transformers asks whether timm is there
        "import importlib.util, nearfar.vision; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_timm_finds_models_whose_systems_are_imported_when_asked_for(order):
    run(
        f"""
import sys
{order}
systems = lambda: {{name.rpartition(".")[2] for name in sys.modules if name.startswith("nearfar.vision.models.")}}
assert timm.is_model("resnet18") and timm.create_model("test_resnet") is not None
assert not systems(), systems()
assert timm.is_model("hornet_tiny_7x7")
assert "hornet" in systems() and not {{"lsnet", "overlock", "transxnet"}} & systems()
assert timm.get_pretrained_cfg("lsnet_t.in1k").hf_hub_id == "jameslahm/lsnet"
assert "lsnet" in systems() and "overlock" not in systems()
assert timm.list_models("overlock*") == ["overlock_b", "overlock_s", "overlock_t", "overlock_xt"]
assert "transxnet_t.in1k" in timm.list_pretrained("transxnet*"), timm.list_pretrained("transxnet*")
assert not timm.is_model("no_such_model")
assert "attnet" in timm.list_modules()
"""
    )


def modules():
    found = {}
    for source in [REPOSITORY / "shared/src", *REPOSITORY.glob("packages/*/src"), *REPOSITORY.glob("apps/*/src")]:
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count as well."""
    found, edges = modules(), {}
    for name, path in found.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                places = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {place if place in found else node.module for place in places}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        edges[name] = imported & set(found) - {name}
    try:
        assert len(list(TopologicalSorter(edges).static_order())) == len(found)
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
