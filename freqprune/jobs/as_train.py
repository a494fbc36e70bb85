"""What ``freqprune train`` runs: a file that the further processes of a distributed run can be started with."""

from freqprune.jobs.cli import train

if __name__ == "__main__":
    train()
