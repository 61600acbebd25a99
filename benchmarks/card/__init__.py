"""What a card does with the programs that `benchmarks.gpu` reads from its compiler."""
