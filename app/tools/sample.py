"""Text from a checkpoint."""

from app.data.tokenizer import Tokenizer
from app.settings import Settings
from app.tools.checkpoints import load_gpt
from app.train.device import choose_device
from app.train.writing import write_texts


def sample(settings: Settings) -> None:
    """Print what a run's model writes.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    device = choose_device(settings.train.device, "float32", "auto")
    model, checkpoint = load_gpt(settings.run_dir, settings.sample.step, device)
    print(f"{checkpoint.folder}:", flush=True)
    for text in write_texts(model, Tokenizer(), settings.sample):
        print(f"---\n{text}")
