"""Does it help on my data? Arms, paired seeds, and how sure the answer is."""
