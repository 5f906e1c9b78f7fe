"""Images, their labels, their way to what a network takes, and the processes that share them."""
