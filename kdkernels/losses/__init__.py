"""One file per loss: public function, module, autograd Function, op schema and fake. Its docstring is the contract."""
