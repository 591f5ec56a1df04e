"""Training of super-resolution networks on folders of pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from nearfar.core.checkpoints import load_state_dict
from nearfar.core.errors import UserError
from nearfar.core.fingerprint import content_digest
from nearfar.core.processes import process_count
from nearfar.core.training import data_loader, train, warmup_cosine
from nearfar.vision.restoration.adversarial import PerceptualLoss, UNetDiscriminator, logistic
from nearfar.vision.restoration.degradation import Degradation, sharpened
from nearfar.vision.restoration.metrics import score
from nearfar.vision.restoration.networks import create_restorer, load_restorer
from nearfar.vision.restoration.pairs import Patches, crop_to, read_rgb, reduced
from nearfar.vision.restoration.restorer import Restorer


@dataclass(frozen=True)
class Recipe:
    """Settings of a training: L1 loss, Adam with betas 0.9 and 0.99, patches flipped and turned.

    An epoch is `steps` steps, each of `batch_size` patches in every process. `milestones`: steps at which the learning
    rate halves; without them it falls by a half cosine. `average`: decay of the averaged weights that are kept, 0 for
    the last ones. `network`: constructor arguments that take precedence over those of `model`.

    `degradation`: "bicubic", as the test sets were made, or "real", see `Degradation`. `sharpen`: learn from sharpened
    targets. `perceptual`: weight of the perceptual loss, which needs VGG19's weights. `adversarial`: weight of the
    adversarial loss, above 0 for a stage against a U-Net discriminator of `discriminator` channels, which sees targets
    that are not sharpened; of such a stage the last epoch is kept, since its PSNR falls.
    """

    model: str = "catanet_x2"
    network: dict[str, Any] = field(default_factory=dict)
    patch_size: int = 64
    batch_size: int = 16
    steps: int = 1000
    epochs: int = 100
    learning_rate: float = 2e-4
    milestones: tuple[int, ...] = ()
    average: float = 0.0
    degradation: Literal["bicubic", "real"] = "bicubic"
    sharpen: bool = False
    perceptual: float = 0.0
    adversarial: float = 0.0
    discriminator: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patch_size", "batch_size", "steps", "epochs", "discriminator"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; it must be at least 0 and below 1")
        if min(self.perceptual, self.adversarial) < 0:
            raise ValueError(
                f"perceptual and adversarial are {self.perceptual}, {self.adversarial}; they are 0 or more"
            )


class Held(Dataset):
    """Whole pictures to choose the epoch by: the middle, at most `side` high-resolution pixels a side, in [0, 1].

    With `real` they are degraded as real pictures, each by a seed of its own.
    """

    def __init__(self, files: Sequence[Path], scale: int, side: int = 512, real: bool = False) -> None:
        self.files, self.scale, self.side, self.real = list(files), scale, side, real

    def content_digest(self) -> str:
        made = f"{self.scale} {self.side}{' real' if self.real else ''}"
        return "".join(content_digest(path) for path in self.files) + made

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        high = read_rgb(self.files[index])
        top, left = (max((n - self.side) // 2, 0) for n in high.shape[1:])
        high = crop_to(high[:, top : top + self.side, left : left + self.side], self.scale)
        if self.real:
            high = high.float() / 255
            return Degradation()(high[None], self.scale, torch.Generator().manual_seed(index))[0], high
        return reduced(high, self.scale).float() / 255, high.float() / 255


class RestorerModule(pl.LightningModule):
    """L1 between restored and true patches, and what else the recipe asks for; PSNR of Y over the held pictures."""

    def __init__(self, model: Restorer, recipe: Recipe, vgg: str | Path | None = None) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.average = None
        if recipe.average:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        self.discriminator = UNetDiscriminator(recipe.discriminator) if recipe.adversarial else None
        self.automatic_optimization = self.discriminator is None
        # no part of the module, so that no checkpoint holds it
        self.__dict__["perceptual"] = PerceptualLoss(vgg) if recipe.perceptual else None

    @property
    def kept(self) -> Restorer:
        """The network whose weights count."""
        return self.model if self.average is None else self.average.module

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor | None:
        low, high = batch
        if self.recipe.degradation == "real":
            low = Degradation()(high, self.model.scale)
        target = sharpened(high) if self.recipe.sharpen else high
        restored = self.model(low)
        losses = {"train_loss": F.l1_loss(restored, target)}
        total = losses["train_loss"]
        if (perceptual := self.__dict__["perceptual"]) is not None:
            losses["perceptual_loss"] = perceptual.to(self.device)(restored, target)
            total = total + self.recipe.perceptual * losses["perceptual_loss"]
        if self.discriminator is not None:
            self._against(self.discriminator, restored, high, total, losses)
        self.log_dict(losses, on_epoch=True, on_step=False, batch_size=len(low))
        return total if self.discriminator is None else None

    def _against(
        self, discriminator: nn.Module, restored: Tensor, high: Tensor, loss: Tensor, losses: dict[str, Tensor]
    ) -> None:
        """A step of the network against the discriminator, then one of the discriminator."""
        ours, its = self.optimizers()  # type: ignore[misc]
        discriminator.requires_grad_(False)
        losses["adversarial_loss"] = logistic(discriminator(restored), True)
        ours.zero_grad()
        self.manual_backward(loss + self.recipe.adversarial * losses["adversarial_loss"])
        ours.step()
        discriminator.requires_grad_(True)
        losses["discriminator_loss"] = logistic(discriminator(high), True) + logistic(
            discriminator(restored.detach()), False
        )
        its.zero_grad()
        self.manual_backward(losses["discriminator_loss"])
        its.step()
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()

    def on_train_batch_end(self, *_args: Any) -> None:
        if self.average is not None:
            self.average.update_parameters(self.model)
            for mean, last in zip(self.kept.buffers(), self.model.buffers(), strict=True):
                mean.copy_(last)

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        low, high = batch
        found = score(self.kept(low)[0], high[0], self.model.scale)
        self.log("psnr", found.psnr, on_epoch=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        recipe, found = self.recipe, []
        for net in (self.model, self.discriminator):
            if net is None:
                continue
            optimizer = torch.optim.Adam(net.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
            schedule = (
                LambdaLR(optimizer, lambda step: 0.5 ** sum(step >= at for at in recipe.milestones))
                if recipe.milestones
                else warmup_cosine(optimizer, 0, recipe.epochs * recipe.steps)
            )
            found.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}})
        return found


def train_restorer(
    pictures: Sequence[Path],
    held: Sequence[Path],
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    vgg: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    fresh: bool = False,
    show_progress: bool = False,
    **trainer_options: Any,
) -> tuple[Restorer, list[dict[str, float]]]:
    """Train on random patches of `pictures` and keep the epoch of the best PSNR on `held`, which share none of them.

    Of an adversarial stage the last epoch is kept.

    `weights`: a network to start from; where its scale is another, its upsampler starts afresh (the papers' x3 and x4
    from x2). `vgg`: torchvision's VGG19 weights, for recipes with a perceptual loss. `folder`: see
    `nearfar.core.training.train`; it then holds the network for `load_restorer`.

    Returns the network in eval mode and one row of metrics per epoch. Raises UserError for pictures below the patch,
    or one that is in both sets.
    """
    both = {content_digest(path): path for path in pictures}
    if shared := [str(path) for path in held if content_digest(path) in both]:
        raise UserError(f"{shared[0]}: is among the pictures to learn from and those that choose the epoch")
    torch.manual_seed(recipe.seed)
    model = create_restorer(recipe.model, **recipe.network)
    if weights is not None:
        start_from(model, weights)
    number = recipe.steps * recipe.batch_size * process_count()
    patches = Patches(pictures, model.scale, recipe.patch_size, number)
    if recipe.adversarial and recipe.patch_size * model.scale % 8:
        raise UserError(
            f"patch_size {recipe.patch_size} at scale {model.scale}: the discriminator takes multiples of 8"
        )
    loader = data_loader(patches, recipe.batch_size, shuffle=True, seed=recipe.seed, num_workers=workers)
    module = RestorerModule(model, recipe, vgg)
    made_from = {"starting weights": weights, "VGG19": vgg if recipe.perceptual else None}
    history = train(
        module,
        loader,
        data_loader(Held(held, model.scale, real=recipe.degradation == "real"), 1),
        epochs=recipe.epochs,
        monitor=None if recipe.adversarial else "psnr",
        seed=recipe.seed,
        folder=folder,
        settings=asdict(recipe),
        data={name: content_digest(Path(path)) for name, path in made_from.items() if path is not None},
        fresh=fresh,
        show_progress=show_progress,
        device=device,
        **trainer_options,
    )
    model = module.kept.eval().cpu()
    if folder is not None:
        model.save_pretrained(folder)
    return model, history


def start_from(model: Restorer, weights: str | Path) -> None:
    """Take over the weights of a network of the same build; the upsampler only where the scale is the same.

    Raises UserError where it is of another kind, CheckpointError where its layers differ.
    """
    other = load_restorer(weights)
    if type(other) is not type(model):
        raise UserError(f"{weights}: holds a {type(other).__name__}, not a {type(model).__name__}")
    state = other.state_dict()
    if other.scale != model.scale:
        own = {n: v for n, v in model.state_dict().items() if n.startswith("enlarge.")}
        state = {n: v for n, v in state.items() if not n.startswith("enlarge.")} | own
    load_state_dict(model, state)
