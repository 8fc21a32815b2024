"""How the bundled model is made: data, VAE, two experts, their few-step form. See README.md beside this file."""
