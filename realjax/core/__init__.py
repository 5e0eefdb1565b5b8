"""What every floor shares: array names, batches, configs, metrics."""
