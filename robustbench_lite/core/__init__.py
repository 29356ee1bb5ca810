"""Floor 0: what everything speaks. Threats, goals and losses, random streams, the oracle, results."""
