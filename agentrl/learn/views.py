"""Rows of a batch with changed observations, aligned with the original by turn and action token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.observation_view import ObservationView
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode
from agentrl.policy.perturbation import PromptView
from agentrl.seeds import derive_seed

Perturb = Callable[[Episode, int], PromptView]
PerturbFactory = Callable[[str, float, int], Perturb]  # (perturbation, amount, seed of the run)


@dataclass(frozen=True)
class Noise:
    """Noise on some positions of a row, of a seed of its own."""

    positions: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class ViewRows:
    """Rows with the action tokens of the batch's rows, in the same order, after changed observations.

    Args:
        tokens: [B, W] int64.
        lengths: [B] int64, up to the last action token; 0 for a row that is not scored.
        action_mask: [B, W] bool.
        noise: The noise of each row.
        scale: The std of the noise.
        taken: Whether the divergence is that of the sampled tokens alone.
    """

    tokens: Tensor
    lengths: Tensor
    action_mask: Tensor
    noise: tuple[tuple[Noise, ...], ...]
    scale: float
    taken: bool

    def select(self, rows: Tensor) -> "ViewRows":
        """Return the given rows in that order."""
        index = rows.to(self.tokens.device)
        width = int(self.lengths[index].max()) + 1 if len(index) else 0
        return ViewRows(
            self.tokens[index, :width],
            self.lengths[index],
            self.action_mask[index, :width],
            tuple(self.noise[row] for row in index.tolist()),
            self.scale,
            self.taken,
        )

    def kept(self) -> Tensor:
        """Mark the tokens that come before the last action token of a row; [B, W] bool."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @contextmanager
    def noisy(self, embedding: nn.Module) -> Iterator[None]:
        """Add the noise to the embeddings of the rows while they are read, one after the other."""
        if not any(self.noise):
            yield
            return
        starts, done = (self.lengths.cumsum(0) - self.lengths).tolist(), 0

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal done
            flat = output.reshape(-1, output.shape[-1]).clone()
            for start, length, parts in zip(starts, self.lengths.tolist(), self.noise, strict=True):
                for part in parts:
                    _add_noise(flat, part, start - done, length, self.scale)
            done += len(flat)
            return flat.view_as(output)

        handle = embedding.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _add_noise(flat: Tensor, part: Noise, start: int, length: int, scale: float) -> None:
    """Add a part of the noise to embeddings [N, d], in which its row begins at `start`, in place."""
    inside = [
        place
        for place, position in enumerate(part.positions)
        if position < length and 0 <= start + position < len(flat)
    ]
    if not inside:
        return
    draw = torch.Generator().manual_seed(part.seed)  # on the CPU, so that every device draws the same
    drawn = torch.randn(len(part.positions), flat.shape[1], generator=draw)[inside].to(flat)
    rows = torch.tensor([start + part.positions[place] for place in inside], device=flat.device)
    size = flat[rows].square().mean(dim=1, keepdim=True).sqrt()
    flat[rows] += scale * size * drawn


def view_rows(
    batch: Batch, view: ObservationView, perturb: Perturb, context: Context, longest: int | None = None
) -> ViewRows:
    """Return the rows of a batch as a view shows them.

    A row is left out if its episode is not drawn, if nothing in it is changed, or if it would be longer than
    the policy can read. The draw depends on the seed of the run and the id of the episode alone.

    Args:
        batch: The rows, with their episodes as they were played.
        view: The view.
        perturb: Returns the changed prompt of a turn.
        context: The context of the step.
        longest: The largest number of tokens of a row; None for no limit.
    """
    probability = view.probability(context)
    rows = []
    for row, owner in enumerate(batch.trajectory.tolist()):
        episode = batch.episodes[owner]
        drawn = derive_seed(context.seed, "viewed", episode.id) < probability * 2**31
        found = _view_of(batch, row, episode, perturb) if drawn else None
        if found is None or (longest is not None and len(found[0]) > longest):
            found = [], [], ()
        rows.append(found)
    width = max((len(tokens) for tokens, _, _ in rows), default=0)
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens, _, _ in rows]
    masks = [[*mask, *[False] * (width - len(mask))] for _, mask, _ in rows]
    device = batch.tokens.device
    action_mask = torch.tensor(masks, dtype=torch.bool).reshape(len(rows), width).to(device)
    positions = torch.arange(width, device=device)
    lengths = torch.where(action_mask, positions, 0).amax(dim=1) if width else torch.zeros_like(batch.lengths)
    return ViewRows(
        torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width).to(device),
        lengths,
        action_mask,
        tuple(noise for _, _, noise in rows),
        view.amount,
        view.taken,
    )


def _view_of(
    batch: Batch, row: int, episode: Episode, perturb: Perturb
) -> tuple[list[int], list[bool], tuple[Noise, ...]] | None:
    """Return tokens, action mask and noise of a row; None if nothing is changed."""
    marked = batch.turns[row].max() if batch.turns.shape[1] else torch.tensor(-1)
    last = int(marked)
    if last < 0 or not bool(batch.action_mask[row].any()):
        return None
    first = max((turn for turn in range(last + 1) if episode.turns[turn].new_sequence), default=0)
    mask = batch.action_mask[row].tolist()
    tokens, kept, noise, changed, at = list[int](), list[bool](), list[Noise](), False, 0
    for index in range(first, last + 1):
        turn, shown = episode.turns[index], perturb(episode, index)
        changed |= shown.changed
        if shown.noisy:
            noise.append(Noise(tuple(len(tokens) + place for place in shown.noisy), shown.seed))
        at += len(turn.prompt_ids)
        tokens += [*shown.ids, *turn.action_ids]
        kept += [*[False] * len(shown.ids), *mask[at : at + len(turn.action_ids)]]
        at += len(turn.action_ids)
    if at != int(batch.lengths[row]):
        raise ValueError(f"a row of episode {episode.id!r} has {int(batch.lengths[row])} tokens, wanted {at}")
    return (tokens, kept, tuple(noise)) if changed else None
