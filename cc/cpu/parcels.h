// What a rank sends in each round of an exchange: cc/cpu/hop.h.

#ifndef JAX_SM_FREE_CC_CPU_PARCELS_H_
#define JAX_SM_FREE_CC_CPU_PARCELS_H_

#include <cstdint>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/hop.h"
#include "cc/cpu/transport.h"

namespace jax_sm_free {

using Parcels = std::vector<Transport::Parcel>;

// What the send of `rank` sends in a round. Destinations start behind `rank`, so that senders
// spread over the receivers.
Parcels ParcelsOfSend(const Config& config, Hop hop, int32_t rank);

// What the forward of `rank` sends in the last round.
Parcels ParcelsOfForward(const Config& config, Hop hop, int32_t rank);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_CPU_PARCELS_H_
