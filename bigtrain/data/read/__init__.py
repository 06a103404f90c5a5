"""What every run reads: corpora, streams of samples, batches."""
