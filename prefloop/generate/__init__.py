"""Text from models: engines behind one protocol, and the prompts we put to them."""
