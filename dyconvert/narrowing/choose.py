"""Which channels stay, and which of them represents each of the others."""

import torch
from torch import Tensor, nn

from dyconvert.narrowing.cut import Choice
from dyconvert.narrowing.graph import Graph, Group


def choose(similarity: Tensor, count: int, group: Group) -> Choice:
    """Cluster a group's channels, and take a representative of each cluster.

    Greedily, the unit is taken that explains most of what those taken before leave unexplained, as pivoted
    Cholesky factorisation does; each other one joins the cluster of the one it is most correlated with.

    Args:
        similarity: `[units, units]`: covariance, in units of each layer's own variance.
        count: units to keep.
    """
    representatives = pivots(similarity, count)
    size = similarity.diagonal().clamp(min=1e-12).sqrt()
    correlation = (similarity / size / size.unsqueeze(1)).abs()
    nearest = representatives[correlation[:, representatives].argmax(1)]
    nearest[representatives] = representatives
    return of_units(nearest, group)


def strongest(strength: Tensor, count: int, group: Group) -> Choice:
    """Keep the units of the largest `strength` `[units]`; each other one is represented by the first of them."""
    representatives = strength.topk(count).indices.sort().values
    nearest = representatives[:1].repeat(len(strength))
    nearest[representatives] = representatives
    return of_units(nearest, group)


def pivots(similarity: Tensor, count: int) -> Tensor:
    """`[count]`: the units that greedy elimination takes, in order.

    Taking unit j leaves the residual R - r r^T, with r = R_j / sqrt(R_jj), and explains sum_i R_ij^2 / R_jj.
    """
    # In single precision where double would take long.
    residual = similarity.double().clone() if len(similarity) <= 1024 else similarity.float().clone()
    squares = residual.square().sum(0)
    explained = 1e-5 * residual.diagonal()  # less is rounding
    floor = explained.mean().clamp(min=1e-30)
    taken: list[int] = []
    for _ in range(count):
        rest = residual.diagonal()
        gain = torch.where(rest > explained, squares / rest.clamp(min=floor), 0.0)
        gain[taken] = -1
        best = int(gain.argmax())
        column = residual[best] / residual[best, best].clamp(min=floor).sqrt()
        # The new sums of squares, from the old: one product with R instead of another pass over it.
        squares += column * (column * column.square().sum() - 2 * (residual @ column))
        residual.addr_(column, column, alpha=-1)
        taken.append(best)
    return torch.tensor(taken)


def unexplained(similarity: Tensor) -> Tensor:
    """`[units]`: the share of the variance that the best 1, 2, ... directions don't explain.

    As Zhang et al. 2016 (arXiv:1505.06798) choose ranks: by the energy of the maps' principal components.
    """
    energy = torch.linalg.eigvalsh(similarity.double()).flip(0).clamp(min=0)
    return 1 - energy.cumsum(0) / energy.sum().clamp(min=1e-30)


def of_units(nearest: Tensor, group: Group) -> Choice:
    """From units, each represented by `nearest`, to channels: those of a unit are represented place by place."""
    members = [torch.nonzero(group.unit == unit).flatten() for unit in range(group.units)]
    representative = torch.empty(group.size, dtype=torch.long)
    for unit, channels in enumerate(members):
        representative[channels] = members[int(nearest[unit])]
    return Choice(representative.unique(), representative)


def by_unit(similarity: Tensor, group: Group) -> Tensor:
    """`[size, size]` to `[units, units]`: the mean over the channels at the same place of each unit."""
    if group.units == group.size:
        return similarity
    members = torch.stack([torch.nonzero(group.unit == unit).flatten() for unit in range(group.units)])  # [u, m]
    return torch.stack([similarity[row[None], row[:, None]] for row in members.T]).mean(0)


def filters(model: nn.Module, graph: Graph, group: Group) -> list[Tensor]:
    """The filters that make a group's channels, `[size, K]` for each of its layers."""
    layers = []
    for member in group.makers:
        module = model.get_submodule(member.name)
        if member.name not in graph.layers:
            continue
        weight = module.weight.detach()
        rows = (weight.transpose(0, 1) if getattr(module, "transposed", False) else weight).flatten(1).float()
        order = member.order(group.size)
        if order is not None:
            layers.append(rows[order])
    return layers


def filter_similarity(model: nn.Module, graph: Graph, group: Group) -> Tensor:
    """The filters' covariance, the mean over the group's layers: for want of images."""
    parts = []
    for rows in filters(model, graph, group):
        parts.append(normalised(rows @ rows.T))
    return by_unit(torch.stack(parts).mean(0), group)


def filter_strength(model: nn.Module, graph: Graph, group: Group) -> Tensor:
    """L1 norms of the filters, summed over the group's layers (Li et al. 2017, arXiv:1608.08710), by unit."""
    norms = torch.stack([rows.abs().sum(1) for rows in filters(model, graph, group)]).sum(0)
    return torch.zeros(group.units).index_add_(0, group.unit, norms)


def normalised(covariance: Tensor) -> Tensor:
    """A covariance over its mean variance, so that layers of different scales count alike."""
    return covariance / covariance.diagonal().mean().clamp(min=1e-30)
