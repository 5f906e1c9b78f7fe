"""What outputs mean: how answers are compared, and what is still parity. numpy only."""
