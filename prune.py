"""Tag a trained network, remove filters, make up for them, fine-tune: python prune.py ckpt=FILE [key=value ...]"""

from freqprune.jobs.cli import prune

if __name__ == "__main__":
    prune()
