"""Regions from boxes and points: tables of them, by colour, and by a small SAM of transformers' own classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.core.errors import UserError
from nearfar.vision.data.prompts import Prompt, Sam, in_boxes, prompted_regions, read_prompts

DECODER = {
    "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "iou_head_depth": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["sam", "sam2"])
def sam(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SAM of random weights, as transformers writes it."""
    import transformers as t

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sam":
        vision = {
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1],
            "num_pos_feats": 8,
        }  # fmt: skip
        prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
        config = t.SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config={"hidden_size": 16, **DECODER}
        )
        t.SamModel(config).save_pretrained(folder)
        images = t.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
        t.SamProcessor(images).save_pretrained(folder)
    else:
        widths = [12, 24, 48, 96]
        trunk = t.Sam2HieraDetConfig(
            hidden_size=12, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1, 1, 1, 1],
            embed_dim_per_stage=widths, num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[],
            window_positional_embedding_background_size=[1, 1],
        )  # fmt: skip
        vision = t.Sam2VisionConfig(
            backbone_config=trunk, backbone_channel_list=widths[::-1], fpn_hidden_size=32,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        )  # fmt: skip
        prompts = t.Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16, mask_input_channels=4)
        config = t.Sam2Config(
            vision_config=vision, prompt_encoder_config=prompts,
            mask_decoder_config=t.Sam2MaskDecoderConfig(hidden_size=32, **DECODER),
        )  # fmt: skip
        t.Sam2Model(config).save_pretrained(folder)
        t.Sam2Processor(t.Sam2ImageProcessor(size={"height": 128, "width": 128})).save_pretrained(folder)
    return folder


def disc(folder: Path, name: str = "a.png") -> np.ndarray:
    """A red disc on green in a file; its mask."""
    generator = np.random.default_rng(0)
    pixels = generator.normal((60, 120, 60), 12, (40, 60, 3))
    inside = np.add.outer((np.arange(40) - 20) ** 2, (np.arange(60) - 30) ** 2) < 120
    pixels[inside] = generator.normal((200, 60, 60), 12, (inside.sum(), 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
    return inside


@pytest.mark.ci
def test_a_sam_of_transformers_cuts_out(sam: Path, tmp_path: Path) -> None:
    """Its masks are those of the model called by hand, for a box, for points, and the best of three for one point."""
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    disc(tmp_path)
    with Image.open(tmp_path / "a.png") as opened:
        picture = opened.convert("RGB")
    model, processor = AutoModelForMaskGeneration.from_pretrained(sam).eval(), AutoProcessor.from_pretrained(sam)
    segment = Sam(sam)
    for prompt, asked, several in (
        (Prompt("a.png", "disc", (15, 5, 45, 36)), {"input_boxes": [[[15, 5, 45, 36]]]}, False),
        (Prompt("a.png", "disc", None, ((30, 20, True),)),
         {"input_points": [[[[30, 20]]]], "input_labels": [[[1]]]}, True),
        (Prompt("a.png", "disc", None, ((30, 20, True), (2, 2, False))),
         {"input_points": [[[[30, 20], [2, 2]]]], "input_labels": [[[1, 0]]]}, False),
    ):  # fmt: skip
        made = processor(images=picture, return_tensors="pt", **asked)
        sizes = [made.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in made]
        made = {k: v.float() if v.is_floating_point() else v for k, v in made.items()}
        with torch.no_grad():
            found = model(**made, multimask_output=several)
        best = int(found.iou_scores[0, 0].argmax())
        want = processor.post_process_masks(found.pred_masks, *sizes)[0][0, best].numpy()
        np.testing.assert_array_equal(segment(picture, prompt), want)
    (tmp_path / "points.csv").write_text("picture,category,x,y,inside\na.png,disc,30,20,1\na.png,disc,2,2,0\n")
    (region,) = prompted_regions(tmp_path, tmp_path / "points.csv", segment)
    np.testing.assert_array_equal(region.mask(), want)
    assert (region.category, region.name, region.picture().size) == ("disc", "a", (60, 40))


@pytest.mark.ci
def test_no_sam_is_fetched_or_guessed(sam: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to take a SAM of the Hugging Face hub write hub:facebook/sam-vit-base"):
        Sam("facebook/sam-vit-base")
    with pytest.raises(UserError, match="cannot be read as a SAM"):
        Sam(tmp_path)
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((sam / name).read_bytes())
    state = load_file(sam / "model.safetensors")
    lost = next(name for name in state if "mask_decoder" in name)
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights of the SAM"):
        Sam(tmp_path)


def test_boxes_of_a_table_by_colour(tmp_path: Path) -> None:
    mask = disc(tmp_path)
    table = tmp_path / "boxes.csv"
    table.write_text("picture,category,left,top,right,bottom\na.png,disc,14,5,46,36\na.png,rim,2,2,12,12\n")
    disc_region, _ = prompted_regions(tmp_path, table, in_boxes)
    found = disc_region.mask()
    assert (found & mask).sum() / (found | mask).sum() > 0.85
    table.write_text(
        "\ufeffpicture,left,top,right,bottom\r\na.png,14,5,46,36\r\na.png,10,5,50,36\r\n"
    )  # a spreadsheet's
    assert [p.category for p in read_prompts(table)] == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,left\na.png,3\n", "needs the columns picture and left"),
        ("picture,x,y,colour\na.png,3,4,red\n", "has the columns colour"),
        ("picture,x,y,x\na.png,3,4,5\n", "has the columns x twice"),
        ("picture,x,y\na.png,3,4\na.png,3,4,5\n", "row 3 has more cells"),
        ("picture,x,y\n", "has no rows"),
        ("picture,x,y\na.png,three,4\n", "row 2: x is 'three', no number"),
        ("picture,x,y\na.png,nan,4\n", "row 2: x, y are"),
        ("picture,x,y,inside\na.png,3,4,maybe\n", "inside is 'maybe'"),
        ("picture,category,x,y\na.png,,3,4\n", "row 2 lacks its category"),
        ("picture,category,x,y,left,top,right,bottom\na.png,disc,,,,,,\n", "neither a box nor a point"),
        ("picture,category,left,top,right,bottom\na.png,disc,1,1,9,9\na.png,disc,2,2,9,9\n", "row 3: .*second box"),
        ("picture,x,y\nb.png,3,4\n", r"names b\.png, which"),
        ("picture,x,y\na.png,60,4\n", r"the point \(60.0, 4.0\) is outside 60 x 40"),
        ("picture,left,top,right,bottom\na.png,14,5,14,36\n", "is outside 60 x 40 pixels, or empty"),
        ("picture,x,y\na.png,3,4\n", "1 in a.png: points are for a SAM"),
    ],
)
def test_tables_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    disc(tmp_path)
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        prompted_regions(tmp_path, table, in_boxes)
