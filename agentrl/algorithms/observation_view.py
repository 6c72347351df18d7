"""Changed observations, under which the scoring pass scores the action tokens a second time."""

from dataclasses import dataclass
from typing import Literal

from agentrl.algorithms.hooks import Coefficient, Context

Perturbation = Literal["noise", "tokens", "items", "paraphrase"]

OBSERVATION_KL = "observation_kl"  # what the scoring pass leaves in `Batch.extras`, [B, T]


@dataclass(frozen=True)
class ObservationView:
    """Change of observations, and the share of episodes that are scored under it.

    The text of the task, the list of admissible actions and everything else around an observation stay as
    they are, and so do the replies.

    Args:
        perturbation: `noise`: normal noise on the embeddings of an observation's tokens. `tokens`: tokens of
            an observation are left out. `items`: its sentences and list entries that share no word with the
            task are left out. `paraphrase`: the environment's own other wording, `info["paraphrase"]`.
        amount: The std of the noise in units of the root mean square of a token's embedding; the probability
            of a token or of an item to be left out; without meaning for `paraphrase`.
        share: The probability of an episode to be scored, of the context: (context) -> number.
        taken: Whether the divergence is that of the sampled token alone, see `taken_divergence`.
    """

    perturbation: Perturbation
    amount: float
    share: float | Coefficient = 1.0
    taken: bool = False

    def probability(self, context: Context) -> float:
        """Return the probability of an episode to be scored in this step."""
        return self.share(context) if callable(self.share) else self.share
