"""A pretrained convolutional network, cut into stages behind the interface of `Classifier`. Any
network that torch.fx can trace is cut where its whole signal is one map: the frozen part can run
once, and what follows a map alone. Batch norms keep their statistics."""

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Part = Literal["none", "head", "last", "all"]
STRIDES = (8, 16, 32)  # of the maps that `encode` returns
TOLERANCE = 1e-3  # between the logits of a network and of its stages, as a share of the largest
CONTAINERS = (nn.Sequential, nn.ModuleList)  # a list of layers is no block
HEADS = (nn.Linear, nn.Conv2d)  # a convolution of what is pooled is a linear layer too
POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class _Tracer(fx.Tracer):
    """Record each layer of torch.nn, or of a class derived from it, as one operation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        bases = set(type(m).__mro__) - {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}
        return any(base.__module__.startswith("torch.nn.") for base in bases)


class _Shapes(fx.Interpreter):
    """Note the shape of what each operation gives. torch's own ShapeProp loads sympy for it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(getattr(result, "shape", ()))
        return result


def _shape(node: fx.Node) -> tuple[int, ...]:
    return node.meta.get("shape", ())


class _Traced:
    """A network as a graph of operations, of which the shapes are known for one image size."""

    def __init__(self, network: nn.Module, size: int) -> None:
        graph = _Tracer().trace(network.eval())
        # which modules each operation is part of, by path
        self.stacks = {
            node.name: {path for path, _ in node.meta.get("nn_module_stack", {}).values()}
            for node in graph.nodes
        }
        self.modules = dict(network.named_modules())
        self.graph, self.size = fx.GraphModule(network, graph), size
        self.graph.graph.eliminate_dead_code()
        self._fold_batch_norms()
        with torch.no_grad():
            _Shapes(self.graph).run(torch.zeros((1, 3, size, size)))

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that an operation applies; None where it is a function."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _fold_batch_norms(self) -> None:
        """Merge each batch norm that follows a convolution into its weights."""
        for node in list(self.graph.graph.nodes):
            norm, before = self.layer(node), node.args[0] if node.args else None
            if type(norm) is not nn.BatchNorm2d or not isinstance(before, fx.Node):
                continue
            layer = self.layer(before)
            if not isinstance(layer, nn.Conv2d) or len(before.users) > 1:
                continue
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight,
                layer.bias,
                norm.running_mean,  # type: ignore[arg-type]
                norm.running_var,  # type: ignore[arg-type]
                norm.eps,
                norm.weight,
                norm.bias,
            )
            node.replace_all_uses_with(before)
            self.graph.graph.erase_node(node)
        self.graph.recompile()

    def maps(self) -> list[fx.Node]:
        """Return the operations whose output [B, C, h, w] is all that later ones depend on."""
        nodes = [node for node in self.graph.graph.nodes if node.op != "get_attr"]
        order = {node: i for i, node in enumerate(nodes)}
        last_use, cuts = 0, []
        for i, node in enumerate(nodes):
            shape = _shape(node)
            square = len(shape) == 4 and shape[2] == shape[3] > 1
            if i and last_use <= i and square and not isinstance(self.layer(node), POOLING):
                cuts.append(node)
            last_use = max([last_use, *(order[user] for user in node.users)])
        return cuts

    def stride(self, node: fx.Node) -> int:
        """Return the image's side over the map's, as the nearest power of two."""
        return 2 ** round(math.log2(self.size / _shape(node)[2]))

    def blocks(self, node: fx.Node) -> set[str]:
        """Return the paths of the modules of several layers that an operation is part of."""
        return {
            path
            for path in self.stacks[node.name]
            if path != node.target and not isinstance(self.modules[path], CONTAINERS)
        }

    def depth(self, node: fx.Node) -> int:
        """Return how many blocks an operation's output lies inside, not at the end of."""
        own = self.blocks(node)
        return min((len(own & self.blocks(user)) for user in node.users), default=0)

    def complete(self, node: fx.Node) -> bool:
        """Return whether a map is a layer's last: no normalization or activation alone follows."""
        (user, *others) = node.users
        next_layer = isinstance(self.layer(user), (nn.Conv2d, *POOLING))
        return bool(others) or next_layer or _shape(user) != _shape(node)

    def stage(self, nodes: list[fx.Node], start: fx.Node) -> fx.GraphModule:
        """Return the operations that lead from one map to the last of these nodes."""
        graph = fx.Graph()
        copies = {start: graph.placeholder("x")}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies and node.op == "get_attr":
                copies[node] = graph.node_copy(node)
            return copies[node]

        for node in nodes:
            if node.op not in ("get_attr", "output"):
                copies[node] = graph.node_copy(node, copied)
        last = nodes[-1]
        graph.output(copied(last.args[0] if last.op == "output" else last))  # type: ignore[arg-type]
        return fx.GraphModule(self.graph, graph)


def _choose_maps(traced: _Traced) -> tuple[list[fx.Node], list[int]]:
    """Return the maps to cut at, in order, and which of them are the last of STRIDES. They are the
    last map of stride 8, the middle and the last of stride 16, the last that a block of stride 32
    gives, and the last of all. Raises ValueError for a network without them."""
    cuts = [node for node in traced.maps() if traced.complete(node)]
    chosen: list[fx.Node] = []
    lasts: list[fx.Node] = []
    for stride in STRIDES:
        own = [node for node in cuts if traced.stride(node) == stride]
        if not own:
            raise ValueError(f"no single map of 1/{stride} of the image's sides")
        own = [node for node in own if traced.blocks(node)] or own
        depths = [traced.depth(node) for node in own]
        (*_, last) = (n for n, depth in zip(own, depths, strict=True) if depth == min(depths))
        if stride == 16:
            for limit in sorted(set(depths)):
                level = [n for n, depth in zip(own, depths, strict=True) if depth <= limit]
                if len(level) > 1:
                    chosen.append(level[(len(level) - 1) // 2])
                    break
        chosen.append(last)
        lasts.append(last)
    chosen = list(dict.fromkeys([*chosen, cuts[-1]]))
    return chosen, [chosen.index(node) for node in lasts]


class PretrainedClassifier(nn.Module):
    """Normalized images [B, 3, H, W] -> logits [B, classes], of a network trained elsewhere.
    network: convolutional, with a linear layer at its end. It is taken over, and its batch norms
    are merged into its convolutions. size: side in pixels of images that it can be fed; H and W may
    be others, best multiples of 32. It stays in evaluation mode, and no part trains until
    `train_only`. Raises ValueError, in one line, for a network that cannot be cut into stages.
    channels: of the maps that `encode` returns."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        network.eval().requires_grad_(False)
        noise = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = network(noise)
        try:
            traced = _Traced(network, size)
        except (fx.proxy.TraceError, TypeError) as error:
            raise ValueError(f"torch.fx cannot trace it ({str(error).splitlines()[0]})") from error
        chosen, self._encoded = _choose_maps(traced)
        self._first_final = self._encoded[0] + 1
        self.channels = tuple(_shape(chosen[i])[1] for i in self._encoded)
        nodes = list(traced.graph.graph.nodes)
        ends = [0, *(nodes.index(node) for node in chosen), len(nodes) - 1]
        *stages, self.tail = (
            traced.stage(nodes[start + 1 : end + 1], nodes[start]) for start, end in pairwise(ends)
        )
        self.stages = nn.ModuleList(stages)
        weighted = [
            str(node.target)
            for node in nodes
            if node.op == "call_module" and list(traced.modules[node.target].parameters())
        ]
        self._head = weighted[-1]
        if not isinstance(dict(self.tail.named_modules()).get(self._head), HEADS):
            raise ValueError("its last layer is not linear")
        self.eval()
        with torch.no_grad():
            difference = (self(noise) - expected).abs().max()
        if difference > TOLERANCE * expected.abs().max():
            raise ValueError("torch.fx traces it to other logits than its own")

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The last layer."""
        head = self.tail.get_submodule(self._head)
        assert isinstance(head, HEADS)
        return head

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the output [B, C, h, w] of each stage: the last map of stride 8, the middle and
        the last of stride 16, those of stride 32. Gradients reach the first of `final_maps` and no
        layer below it."""
        maps, x = [], images
        for i, stage in enumerate(self.stages):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i > self._first_final):
                x = stage(x)
            if i == self._first_final:
                x = x.detach().requires_grad_()
            maps.append(x)
        return maps

    def final(self, maps: list[Tensor]) -> list[Tensor]:
        """Return those of `maps` that `final_maps` returns."""
        return maps[self._first_final :]

    def final_maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, C, h, w] of strides 16 and 32 whose LayerCAM counts as evidence.
        Gradients reach the first of them and no layer below it."""
        return self.final(self.maps(images))

    def encoded(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Return those of `maps` that `encode` returns, without their gradients."""
        return tuple(maps[i].detach() for i in self._encoded)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the last maps [B, C, h, w] of strides 8, 16 and 32, without gradients."""
        maps = []
        with torch.no_grad():
            for stage in self.stages[: self._encoded[-1] + 1]:
                images = stage(images)
                maps.append(images)
        return self.encoded(maps)

    def features(self, images: Tensor) -> Tensor:
        """Return the last feature map, [B, C, H/32, W/32]."""
        for stage in self.stages:
            images = stage(images)
        return images

    def classify(self, features: Tensor) -> Tensor:
        """Return logits [B, classes] of the last feature map."""
        return self.tail(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def set_outputs(self, outputs: Sequence[int | None]) -> None:
        """Replace the logits by these of them, in this order; None: a new one, which is 0."""
        known = [i for i, output in enumerate(outputs) if output is not None]
        for name, old in list(self.head.named_parameters()):
            new = old.new_zeros((len(outputs), *old.shape[1:]))
            new[known] = old.detach()[[output for output in outputs if output is not None]]
            setattr(self.head, name, nn.Parameter(new, old.requires_grad))

    def _modules_of(self, part: Part) -> list[nn.Module]:
        after = self._encoded[1] + 1  # the last map of stride 16
        return {
            "none": [],
            "head": [self.head],
            "last": [*self.stages[after:], self.tail],
            "all": [self],
        }[part]

    def train_only(self, part: Part) -> Self:
        """Let these weights alone train: none, those of the head (the last layer), all that follow
        the last map of stride 16, or all. Return self."""
        self.requires_grad_(False)
        for module in self._modules_of(part):
            module.requires_grad_(True)
        return self

    def copy(self, part: Part) -> Self:
        """Return a copy of which `part` trains. Both share the others, which train in neither."""
        own = {id(weight) for m in self._modules_of(part) for weight in m.parameters()}
        shared = {id(weight): weight for weight in self.parameters() if id(weight) not in own}
        return deepcopy(self, shared).train_only(part)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the weights that train, by their names in `state_dict`."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
