"""What a run's log shows, as pictures and as a few lines of text. `python -m benchmarks.plots RUN [RUN ...]`"""
