"""What people bring along: Lightning's modules after training, lists of graphs, folders of images, quantized layers."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import FAMILIES, digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import llc_fast

SHORT: dict[str, Any] = {"num_chains": 2, "num_draws": 6, "num_burnin": 2, "lr": 1e-4, "progress": False}


def _required(package: str) -> Any:
    families.import_torchvision()
    return pytest.importorskip(package)


# ---- Lightning -----------------------------------------------------------------------------------------------


def _trained(metric: bool) -> nn.Module:
    """A module that a trainer has trained, and that still knows it; with a metric in its step, or not."""
    lightning = _required("lightning")
    torchmetrics = pytest.importorskip("torchmetrics")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = families.mlp(64, 16, 10)
            if metric:
                self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Tensor]:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.log("loss", loss, prog_bar=True)
            self.log_dict({"twice": 2 * loss})
            if metric:
                self.accuracy(logits, batch[1])
                self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return {"loss": loss, "logits": logits}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = Module()
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(model, DataLoader(TensorDataset(*digits()), batch_size=64))
    return model.eval()


@pytest.mark.parametrize("metric", [False, True])
def test_a_module_that_lightning_has_trained(metric: bool) -> None:
    """Its `training_step` is a loss: what it logs goes nowhere, and its metrics are as before."""
    model = _trained(metric)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", llc_fast.LLCWarning)  # of a run as short as this
        found = llc_fast.estimate_llc(
            model, digits(), lambda model, batch: model.training_step(batch, 0), batch_size=32, **SHORT
        )
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes and model.trainer is not None
    if metric:
        assert model.accuracy.tp.sum() == 0 and not model.accuracy.update_called
    expected = llc_fast.estimate_llc(copy.deepcopy(model.net), digits(), F.cross_entropy, batch_size=32, **SHORT)
    assert found.init_loss == pytest.approx(expected.init_loss, rel=1e-5)
    # A metric that counts is no function of parameters: chains go one by one, and are paired otherwise.
    if not metric:
        np.testing.assert_allclose(found.loss_trace, expected.loss_trace, rtol=1e-4)
    else:
        assert "attributes" in found.diagnostics["strategy_reason"]
        assert found.llc_mean == pytest.approx(expected.llc_mean, abs=4)


# ---- graphs --------------------------------------------------------------------------------------------------


def test_a_list_of_graphs() -> None:
    """They are samples: n of them, in minibatches that a seed decides, with the losses of plain PyTorch."""
    _required("torch_geometric")
    from torch_geometric.data import Batch
    from torch_geometric.loader import DataLoader as GraphLoader

    graphs = families.made_up_graphs(50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = families.graph_network()
    sizes: list[int] = []

    def look(draw: llc_fast.Draw) -> float:
        sizes.append(draw.batch.num_graphs)
        with torch.no_grad():
            again = families.graph_loss(copy.deepcopy(model), draw.batch.clone())
        return float(draw.loss - again) if draw.draw == 0 else 0.0

    options = {**SHORT, "num_burnin": 0, "batch_size": 8, "observables": {"off": look}}
    found = llc_fast.estimate_llc(model, graphs, families.graph_loss, **options)
    assert found.settings["num_samples"] == 50 and {*sizes} == {8}
    np.testing.assert_allclose(found.observables["off"], 0, atol=1e-6)
    again = llc_fast.estimate_llc(model, graphs, families.graph_loss, **options)
    np.testing.assert_array_equal(again.loss_trace, found.loss_trace)
    assert not {"irreproducible", "num-samples"} & {w.code for w in found.warnings}
    pieces = llc_fast.Execution(microbatch_size=3)  # whole graphs, whose losses add up to that of the minibatch
    split = llc_fast.estimate_llc(model, graphs, families.graph_loss, **options, execution=pieces)
    np.testing.assert_allclose(split.loss_trace, found.loss_trace, rtol=1e-5)
    exact = float(families.graph_loss(model, Batch.from_data_list(graphs)).detach())
    loader = GraphLoader(graphs, batch_size=8)  # in one order: L(w*) is the mean over its minibatches
    ordered = llc_fast.estimate_llc(model, loader, families.graph_loss, **{**SHORT, "observables": None})
    pieces = [float(families.graph_loss(model, batch).detach()) for batch in loader]
    assert ordered.init_loss == pytest.approx(np.mean(pieces), rel=1e-5) and ordered.settings["num_samples"] == 50
    assert found.init_loss == pytest.approx(exact, abs=6 * found.diagnostics["init_loss_stderr"] + 0.05)


def test_sums_over_graphs_are_refused() -> None:
    """In a list and from a loader; and so are sums over batches that hold texts beside tensors."""
    _required("torch_geometric")
    from torch_geometric.loader import DataLoader as GraphLoader

    def summed(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch), batch.y, reduction="sum")

    graphs = families.made_up_graphs(20)
    for data in (graphs, GraphLoader(graphs, batch_size=8, shuffle=True)):
        with pytest.raises(ValueError, match="loss_fn sums over the batch"):
            llc_fast.estimate_llc(families.graph_network(), data, summed, **SHORT)
    images, labels = digits()
    named = [{"x": x, "y": y, "name": "a"} for x, y in zip(images, labels, strict=True)]
    loader = DataLoader(named, batch_size=32, shuffle=True)
    for reduction, outcome in (
        ("sum", pytest.raises(ValueError, match="sums over the batch")),
        ("mean", nullcontext()),
    ):
        with outcome:
            llc_fast.estimate_llc(
                families.mlp(64, 8, 10),
                loader,
                lambda model, batch, how=reduction: F.cross_entropy(model(batch["x"]), batch["y"], reduction=how),
                **SHORT,
            )


@pytest.mark.gpu
def test_graphs_on_a_gpu() -> None:
    """They are moved there, and the user's stay where they are."""
    try:
        _required("torch_geometric")
    except RuntimeError:  # it asks the CUDA library itself
        pytest.skip("torch_geometric does not import under CUDA emulation")
    graphs = families.made_up_graphs(20)
    model = families.graph_network()
    options = {**SHORT, "batch_size": 8}
    on_cpu = llc_fast.estimate_llc(copy.deepcopy(model), graphs, families.graph_loss, **options)
    on_gpu = llc_fast.estimate_llc(model, graphs, families.graph_loss, device="cuda", **options)
    np.testing.assert_allclose(on_gpu.loss_trace, on_cpu.loss_trace, rtol=1e-4)
    assert graphs[0].x.device.type == "cpu" == next(model.parameters()).device.type


# ---- images --------------------------------------------------------------------------------------------------


def _folder(root: Path) -> Path:
    """Images of digits as files, a folder for each class."""
    image = pytest.importorskip("PIL.Image")
    images, labels = digits()
    pixels = ((images - images.min()) / (images.max() - images.min()) * 255).to(torch.uint8)
    for k, (picture, label) in enumerate(zip(pixels[:60], labels[:60].tolist(), strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        image.fromarray(picture[0].numpy()).save(root / str(label) / f"{k}.png")
    return root


@pytest.mark.parametrize("flips", [False, True])
def test_a_folder_of_images_through_a_loader_with_workers(flips: bool, tmp_path: Path) -> None:
    """As people train: files, transforms, workers. Augmentation is seen, and follows the seed."""
    vision = _required("torchvision")
    from torchvision.datasets import ImageFolder

    steps = [vision.transforms.Grayscale(), vision.transforms.ToTensor()]
    if flips:
        steps.insert(0, vision.transforms.RandomHorizontalFlip())
    data = ImageFolder(str(_folder(tmp_path)), vision.transforms.Compose(steps))
    loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = families.mlp(64, 8, len(data.classes)).eval()
    options = {**SHORT, "num_chains": 1}
    found = llc_fast.estimate_llc(model, loader, F.cross_entropy, **options)
    assert found.settings["num_samples"] == 60
    assert not found.settings["control_variate"]
    if flips:
        assert "augmentation" in found.diagnostics["unpaired_reason"]
        again = llc_fast.estimate_llc(model, loader, F.cross_entropy, **options)
        np.testing.assert_array_equal(again.loss_trace, found.loss_trace)
    else:
        everything = next(iter(DataLoader(data, batch_size=60)))
        assert found.init_loss == pytest.approx(float(F.cross_entropy(model(everything[0]), everything[1])), rel=1e-5)
    in_memory = llc_fast.estimate_llc(model, data, F.cross_entropy, batch_size=16, **options)
    assert in_memory.settings["num_samples"] == 60
    assert in_memory.settings["control_variate"] is not flips


# ---- batch normalization -------------------------------------------------------------------------------------


def _normalized() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        for _ in range(30):
            model(digits()[0])
    return model


def test_three_readings_of_batch_normalization() -> None:
    """Frozen statistics, those of the minibatch, and folded: each is the loss that it says, and leaves the model be."""
    images, labels = digits()
    model = _normalized()
    folded = nn.Sequential(
        torch.nn.utils.fusion.fuse_conv_bn_eval(model[0].eval(), model[1].eval()), *copy.deepcopy(model[2:])
    ).eval()
    model.eval()
    options = {**SHORT, "batch_size": 64}
    frozen = llc_fast.estimate_llc(model, (images, labels), F.cross_entropy, **options)
    as_one = llc_fast.estimate_llc(folded, (images, labels), F.cross_entropy, **options)
    expected = float(F.cross_entropy(model(images), labels).detach())
    assert frozen.init_loss == pytest.approx(expected, rel=1e-5) == as_one.init_loss
    assert frozen.settings["num_parameters"] == as_one.settings["num_parameters"] + 8
    model.train()
    statistics = model[1].running_mean.clone()
    ours = llc_fast.estimate_llc(model, (images, labels), F.cross_entropy, **options)
    assert torch.equal(model[1].running_mean, statistics) and model.training
    assert "training-mode" in {w.code for w in ours.warnings} and ours.settings["strategy"] == "sequential"
    with torch.no_grad():
        pieces = [
            float(F.cross_entropy(copy.deepcopy(model)(images[k : k + 64]), labels[k : k + 64]))
            for k in range(0, 256, 64)
        ]
    assert ours.init_loss == pytest.approx(np.mean(pieces), rel=0.1) and ours.init_loss != frozen.init_loss


# ---- quantized -----------------------------------------------------------------------------------------------


def test_what_is_float_in_a_quantized_model() -> None:
    """Scales and biases are sampled; whole numbers stay, and asking for them is an error that says why."""
    case = FAMILIES["int8"].make(0)
    model = case.model
    kept = [m.weight.clone() for m in model if isinstance(m, families.Int8Linear)]
    found = llc_fast.estimate_llc(model, case.data, case.loss_fn, **SHORT)
    assert found.settings["num_parameters"] == sum(p.numel() for p in model.parameters())
    for before, layer in zip(kept, [m for m in model if isinstance(m, families.Int8Linear)], strict=True):
        assert torch.equal(before, layer.weight)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 64, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.float().T

    with pytest.raises(ValueError, match=r"the model is quantized \(int8\): its weights are whole numbers"):
        llc_fast.estimate_llc(Whole(), case.data, case.loss_fn, **SHORT)
    with pytest.raises(TypeError, match=r"parameter 'weight' has dtype torch\.int8"):
        llc_fast.estimate_llc(Whole(), case.data, case.loss_fn, params="*", **SHORT)


# ---- experts -------------------------------------------------------------------------------------------------


def test_an_expert_that_rests_in_one_minibatch_is_not_unused() -> None:
    class Rare(nn.Module):
        """A branch that a sixteenth of the samples take, and one that none does."""

        def __init__(self) -> None:
            super().__init__()
            self.usual, self.rare, self.never = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.usual(x)
            rows = torch.where(x[:, 0] > 100)[0]
            return out.index_add(0, rows, self.rare(x[rows]) * 1e-3) if len(rows) else out

    x, y = torch.ones(64, 2), torch.zeros(64, 1)
    x[::16, 0] = 101.0
    found = llc_fast.estimate_llc(Rare(), (x, y), F.mse_loss, batch_size=8, **SHORT)
    unused = [w for w in found.warnings if w.code == "unused"]
    assert len(unused) == 1 and "never.weight" in unused[0] and "rare" not in unused[0]
