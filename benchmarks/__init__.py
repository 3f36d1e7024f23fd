"""What the documents quote, each table with one command. These programs may import everything, nothing imports them."""
