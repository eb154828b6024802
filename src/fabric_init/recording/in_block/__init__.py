"""Write down what a constructor does while a block is open."""
