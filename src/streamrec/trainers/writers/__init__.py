"""Writers: callbacks that hand what they are told to a tool that draws it."""

from streamrec.trainers.writers.prometheus import Prometheus
from streamrec.trainers.writers.tensorboard import TensorBoard
from streamrec.trainers.writers.wandb import WandB

__all__ = ["Prometheus", "TensorBoard", "WandB"]
