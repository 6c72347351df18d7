"""Changed observations for the toy policy, whose prompts have no text: the first token of each turn."""

from agentrl.algorithms.observation_view import ObservationView
from agentrl.data import Episode
from agentrl.learn.views import Perturb
from agentrl.policy.perturbation import PromptView
from agentrl.seeds import derive_seed


def toy_perturb(perturbation: str, amount: float, seed: int) -> Perturb:
    """Leave out the first token of a turn of several, or add noise to it."""

    def changed(episode: Episode, index: int) -> PromptView:
        ids = episode.turns[index].prompt_ids
        if perturbation != "noise":
            return PromptView(ids[1:], changed=True) if len(ids) > 1 else PromptView(ids, changed=False)
        return PromptView(ids, (0,), derive_seed(seed, episode.id, index))

    return changed


NOISE = ObservationView("noise", 0.5)
TOKENS = ObservationView("tokens", 0.5)
