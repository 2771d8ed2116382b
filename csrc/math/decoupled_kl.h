// Decoupled KL: each row belongs to the foreground or the background, which have their own weight, temperature and
// count (DeFeat eq. 6-9). The row's arithmetic is temperature_kl's.
#pragma once

#include "temperature_kl.h"

KD_NAMESPACE_BEGIN

struct Region {
  double weight, temperature, count;

  // A row's share of the loss, apart from its own weight and T^2 KL. An empty region has no rows to share.
  KD_HD double share(bool divide) const { return divide ? weight / larger(1.0, count) : weight; }
};

KD_NAMESPACE_END
