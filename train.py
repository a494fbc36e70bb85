"""Train a classifier and tag it at the end of every epoch: python train.py data=cifar10 model=resnet32 [key=value
...]"""

from freqprune.jobs.cli import train

if __name__ == "__main__":
    train()
