"""What ``freqprune explain`` runs."""

from freqprune.jobs.cli import explain

if __name__ == "__main__":
    explain()
