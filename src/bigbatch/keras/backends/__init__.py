"""What only one of Keras's backends has."""
