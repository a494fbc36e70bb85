"""What ``freqprune prune`` runs: a file that the further processes of a distributed run can be started with."""

from freqprune.jobs.cli import prune

if __name__ == "__main__":
    prune()
